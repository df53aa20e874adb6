"""The integer kernels of the runtime, and the reference program executed with them."""
