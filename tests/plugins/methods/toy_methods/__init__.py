"""Methods of somebody else's: a strategy of search, and an importance."""
