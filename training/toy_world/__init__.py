"""How the weights of the toy world were made; see the integration's README for the commands."""
