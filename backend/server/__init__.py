"""The back end: a table of tasks, a queue that runs them, the platform's REST contract from the server's side."""
