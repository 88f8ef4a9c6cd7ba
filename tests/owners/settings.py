from __future__ import annotations

import os

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS, METERLY

INSTALLED_APPS = [*INSTALLED_APPS, "tests.owners"]
METERLY = {**METERLY, "CUSTOMER_MODEL": f"owners.{os.environ['OWNER']}"}
