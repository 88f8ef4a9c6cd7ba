"""Guarded views under real servers: gunicorn and uvicorn, real sockets, real kills."""
