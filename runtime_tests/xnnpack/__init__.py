"""Reference programs in ExecuTorch's form, and the process that lowers and runs them."""
