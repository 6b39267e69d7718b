"""The command line `jaxhpo`."""
