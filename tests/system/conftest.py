"""Fixtures that boot a host for the tests of this directory, and skip them, or fail, where none can boot."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from llmstudiod.demo.tiny_gguf import Fault, TinyModel, write_tiny_gguf

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import MODELS, RECIPES, Daemon  # noqa: TID252
from .host import Host, HostError, build_base, missing  # noqa: TID252

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
DIST_PACKAGES = "/usr/lib/python3/dist-packages"
# What a package would install. -I: nothing in the caller's directory or environment may add a module.
EXECUTABLES = {
    "/usr/bin/llmstudioctl": "llmstudiod.ctl.main:main",
    "/usr/libexec/llmstudiod/llmstudiod": "llmstudiod.daemon.main:main",
    "/usr/libexec/llmstudiod/llmstudio-launcher": "llmstudiod.privileged.__main__:main",
}
UNIT_SUFFIXES = {".service", ".socket", ".slice", ".target", ".timer", ".path", ".d"}
EXECUTABLE = """\
#!/usr/bin/python3 -I
import sys

from {module} import {function}

sys.exit({function}())
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test below this directory, and give it time for the first build of the base tree."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("system")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


def give_up(reason: str) -> NoReturn:
    """Skip the test, or fail it where LLMSTUDIO_TEST_REQUIRE_ALL=1 says that this machine must be able to run all."""
    if os.environ.get("LLMSTUDIO_TEST_REQUIRE_ALL") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def base_tree() -> Path:
    """The tree that hosts boot from, built if need be."""
    reason = missing()
    if reason is not None:
        give_up(reason)
    try:
        return build_base()
    except HostError as error:
        give_up(f"the base tree cannot be built: {error}")


@pytest.fixture(scope="module")
def host(base_tree: Path) -> Iterator[Host]:
    """A bare host, shared by a module's tests; a test that breaks it boots its own with `Host()`."""
    with Host() as booted:
        yield booted


@pytest.fixture(scope="module")
def installed_host(base_tree: Path) -> Iterator[Host]:
    """A host with this project installed where its package puts it, and nothing started yet."""
    with Host() as booted:
        install(booted)
        yield booted


def install(host: Host) -> None:
    """Put the project of this working tree into a host, as its package would, and reload systemd."""
    host.put(REPOSITORY / "llmstudiod", f"{DIST_PACKAGES}/llmstudiod")
    host.run("python3", "-m", "compileall", "-q", f"{DIST_PACKAGES}/llmstudiod")
    for path, entry_point in EXECUTABLES.items():
        module, function = entry_point.split(":")
        host.write(path, EXECUTABLE.format(module=module, function=function), mode=0o755)
    host.run("mkdir", "-p", "/etc/llmstudio", "/var/lib/llmstudio/models")
    if (REPOSITORY / "etc").is_dir():
        host.put(REPOSITORY / "etc", "/etc/llmstudio")
    # Users and directories first: units name them.
    for kind in ("sysusers", "tmpfiles"):
        for file in sorted((REPOSITORY / "systemd").glob(f"*{kind}*")):
            host.put(file, f"/usr/lib/{kind}.d/llmstudiod.conf")
    host.run("systemd-sysusers")
    host.run("systemd-tmpfiles", "--create")
    for file in sorted((REPOSITORY / "systemd").glob("*")):
        if file.suffix in UNIT_SUFFIXES:
            host.put(file, f"/usr/lib/systemd/system/{file.name}")
    host.run("systemctl", "daemon-reload")


@pytest.fixture(scope="session")
def gguf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models on the machine: ``tiny.gguf`` chats, ``embed.gguf`` embeds, ``cut.gguf`` is truncated."""
    directory = tmp_path_factory.mktemp("gguf")
    write_tiny_gguf(directory / "tiny.gguf")
    write_tiny_gguf(directory / "embed.gguf", TinyModel(name="embed", pooling_type="mean"))
    write_tiny_gguf(directory / "cut.gguf", TinyModel(name="cut", fault=Fault.TRUNCATED))
    directory.chmod(0o755)
    return directory


@pytest.fixture
def daemon(installed_host: Host, gguf_dir: Path) -> Iterator[Daemon]:
    """The daemon, not started, with the model ``tiny``; afterwards nothing of it runs and its files are gone."""
    made = Daemon(installed_host)
    installed_host.run("mkdir", "-p", RECIPES, MODELS)
    installed_host.put(gguf_dir / "tiny.gguf", f"{MODELS}/tiny.gguf")
    made.use_settings(drain_timeout="5s", wait_comment_interval="1s")
    yield made
    made.reset()
    installed_host.run("sh", "-c", f"rm -rf {MODELS}/*")
