"""Nothing in here can be used."""
