"""The applications that the servers are pointed at."""

from __future__ import annotations

from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application

from django_meterly.ledger.asgi import BodyLimit

wsgi = get_wsgi_application()
asgi = BodyLimit(get_asgi_application(), path="/ledger/")
