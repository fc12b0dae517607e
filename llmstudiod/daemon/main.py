"""The daemon: builds everything, serves until SIGTERM, reloads on SIGHUP.

A connection may be waiting for this process to start, so what a first answer does not need is imported later.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmstudiod import __version__
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.daemon import logs, sockets
from llmstudiod.daemon.notify import Notifier

if TYPE_CHECKING:
    from llmstudiod.daemon.application import Application

MAX_FILES = 65536

logger = logging.getLogger("llmstudiod")


def main(argv: list[str] | None = None) -> int:
    """Run the daemon; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="llmstudiod",
        description="Serves the GGUF models of this machine at one OpenAI endpoint.",
        epilog="In development LLMSTUDIO_<SETTING> in the environment overrides a setting (with --development).",
    )
    parser.add_argument("--config", type=Path, help="settings file (default: /etc/llmstudio/llmstudiod.yaml)")
    parser.add_argument("--development", action="store_true", help="let LLMSTUDIO_<SETTING> override settings")
    parser.add_argument("--version", action="version", version=f"llmstudiod {__version__}")
    arguments = parser.parse_args(argv)
    _allow_many_files()
    gc.disable()  # imports make many objects and no garbage; looking for some costs a tenth of the start
    logs.set_up("info")
    inherited = sockets.inherited()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(arguments, inherited))
    except LlmstudioError as error:
        logger.error("%s", error.message)  # noqa: TRY400 - a user's error, no bug
        if error.hint:
            logger.error("hint: %s", error.hint)  # noqa: TRY400
        return error.exit_code
    return 0


def _allow_many_files() -> None:
    """Take as many file descriptors as we may: each client is one, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(arguments: argparse.Namespace, inherited: sockets.Listeners) -> None:
    # Slow to import (aiohttp 230 ms, pydantic 60 ms): after the arguments are known to be good.
    from llmstudiod.core.settings import DEFAULT_FILE
    from llmstudiod.daemon.application import Application

    environment = dict(os.environ) if arguments.development else None
    application = Application(arguments.config or Path(DEFAULT_FILE), environment, clock=time.monotonic)
    loaded = application.loaded.settings
    logging.getLogger().setLevel(loaded.log_level.upper())
    listeners = sockets.open_missing(inherited, addresses=loaded.listen, admin_path=loaded.admin_socket)
    notifier = Notifier()
    for note in listeners.notes:
        logger.warning("%s", note)
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Before READY=1: systemd 262 sends SIGHUP for a reload only to those who are ready for it.
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    await application.adopt()
    async with application.serving(listeners), asyncio.TaskGroup() as tasks:
        # READY first and alone; what follows may take its time.
        notifier.ready()
        # What is there now stays, and what comes with a request goes with it: there are next to no cycles to look for.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        gc.enable()
        keepers = [
            tasks.create_task(_keep_alive(notifier)),
            tasks.create_task(_keep_reloading(application, notifier, reload)),
            tasks.create_task(_keep_status(application, notifier)),
            tasks.create_task(_after_start(application)),
        ]
        await stop.wait()
        logger.info("stopping: new requests are refused, those in flight may end")
        notifier.stopping(within_s=application.loaded.settings.drain_timeout + 30)
        await application.stop()
        for keeper in keepers:
            keeper.cancel()
    logger.info("stopped")
    sys.stderr.flush()


async def _keep_alive(notifier: Notifier) -> None:
    while notifier.watchdog_period_s:
        notifier.alive()
        await asyncio.sleep(notifier.watchdog_period_s)


async def _after_start(application: "Application") -> None:
    try:
        await application.after_start()
    except Exception:  # nothing in there is worth the endpoint
        logger.exception("the start could not be completed")


async def _keep_reloading(application: "Application", notifier: Notifier, reload: asyncio.Event) -> None:
    while True:
        await reload.wait()
        reload.clear()
        notifier.reloading()
        try:
            await application.reload()
        except Exception:  # a bug in reading files must not take the running models down
            logger.exception("the reload failed; what was in force stays in force")
        notifier.ready()
        notifier.status(application.status_line())


async def _keep_status(application: "Application", notifier: Notifier) -> None:
    while True:
        notifier.status(application.status_line())
        await application.supervisor.changed()
        await asyncio.sleep(0.2)  # a burst of changes is one line


if __name__ == "__main__":
    sys.exit(main())
