from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

import pytest

import django_meterly

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_cfg() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    return parser


def test_every_public_name_resolves() -> None:
    for name in django_meterly.__all__:
        assert getattr(django_meterly, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = django_meterly.nothing


def test_no_more_is_required_than_was_agreed(setup_cfg: ConfigParser) -> None:
    lines = setup_cfg["options"]["install_requires"].split("\n")
    names = {re.split(r"\W", line.replace("-", "_"))[0].lower() for line in lines}
    assert names - {""} == {
        "celery",
        "django",
        "django_environ",
        "djangorestframework",
        "requests",
        "tenacity",
        # Comes with requests; named because the transport's connections are its.
        "urllib3",
    }


def test_the_metadata_reads_the_version_from_the_package(
    setup_cfg: ConfigParser,
) -> None:
    assert setup_cfg["metadata"]["version"] == "attr: django_meterly.__version__"


def test_the_changelog_tells_of_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(
        rf"^## \[?{re.escape(django_meterly.__version__)}\b", changelog, re.M
    )


def test_the_classifiers_are_the_versions_that_tox_tests(
    setup_cfg: ConfigParser,
) -> None:
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", "utf-8")
    environments = tox["tox"]["env_list"]
    classifiers = setup_cfg["metadata"]["classifiers"]

    def claimed(prefix: str) -> set[str]:
        return set(re.findall(rf"{prefix} :: (\d+\.\d+)$", classifiers, re.M))

    def tested(factor: str) -> set[str]:
        return {
            f"{major}.{minor}"
            for major, minor in re.findall(rf"\b{factor}(\d)(\d+)", environments)
        }

    assert tested("py") == claimed("Programming Language :: Python")
    assert tested("django") == claimed("Framework :: Django")
