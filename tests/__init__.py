"""A package, so that no other package's tests in site-packages are taken for these in spawned processes."""
