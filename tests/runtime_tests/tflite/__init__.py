"""Tests of runtime_tests.tflite."""
