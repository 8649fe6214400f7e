"""The web pages, over the service layer of `backend/server`."""
