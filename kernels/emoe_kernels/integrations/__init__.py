"""Other libraries' models on these kernels. Each module imports its library, and is imported by who wants it."""
