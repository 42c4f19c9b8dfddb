"""Settings of the public functions: a record each, which their signatures are made from."""
