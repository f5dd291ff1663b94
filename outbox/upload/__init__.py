"""HTTP: the client that uploads events, and its parts. Only this folder knows requests and urllib3."""
