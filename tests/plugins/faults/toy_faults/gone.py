"""A strategy whose own needs are not installed."""

raise ImportError("no module that anybody has")
