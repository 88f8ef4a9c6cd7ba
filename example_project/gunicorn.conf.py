"""How gunicorn serves the studio: ``gunicorn studio.wsgi``."""

from __future__ import annotations

workers = 2
threads = 4
# Newer versions would leave a socket in the home directory.
control_socket_disable = True
