from __future__ import annotations

import os

from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")

# So that one process is all it takes to try this out. In production static files
# are collected (manage.py collectstatic) and served by the web server, and this
# is get_wsgi_application() alone.
application = StaticFilesHandler(get_wsgi_application())
