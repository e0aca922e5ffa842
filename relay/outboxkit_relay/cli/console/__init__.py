"""Console: how every command talks to people and machines."""
