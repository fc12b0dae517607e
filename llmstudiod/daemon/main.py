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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmstudiod import __version__
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.daemon import logs, sockets
from llmstudiod.daemon.notify import Notifier

if TYPE_CHECKING:
    from llmstudiod.adapters.file_watch import FileWatch
    from llmstudiod.daemon.application import Application

MAX_FILES = 65536
IDLE_LOOK_S = 0.5
KEEPER_PAUSE_S = 10.0

logger = logging.getLogger("llmstudiod")


class _Watched(NamedTuple):
    """Files that are looked at now and then; together the two times are what the manual page promises."""

    name: str
    period_s: float
    settle_s: float


_CONFIG, _MODELS = _Watched("settings or recipes", 1.0, 1.0), _Watched("model files", 6.0, 3.0)


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
    await application.take_over()
    async with application.serving(listeners), asyncio.TaskGroup() as tasks:
        # READY first and alone; what follows may take its time.
        notifier.ready()
        # What is there now stays, and what comes with a request goes with it: there are next to no cycles to look for.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        gc.enable()
        heart = tasks.create_task(kept("watchdog", lambda: _keep_alive(notifier), pause_s=1.0))
        keepers: dict[str, Callable[[], Awaitable[None]]] = {
            "reload": lambda: _keep_reloading(application, notifier, reload),
            "status": lambda: _keep_status(application, notifier),
            "watch of the configuration": lambda: _keep_watching(_CONFIG, application.config_watch(), reload),
            "watch of the model files": lambda: _keep_watching(_MODELS, application.model_watch(), reload),
            "look for units": application.leftovers.keep_looking,
            "history": lambda: application.history.keep(application.supervisor.views),
            "usage": application.usage.keep,
            "live figures": application.keep_live,
            "start": lambda: _after_start(application),
        }
        if inherited.http:
            keepers["exit when idle"] = lambda: _exit_when_idle(application, stop)
        kept_tasks = [tasks.create_task(kept(name, keep)) for name, keep in keepers.items()]
        await stop.wait()
        logger.info("stopping: new requests are refused, those in flight may end")
        notifier.stopping(within_s=application.loaded.settings.drain_timeout + 30)
        for task in kept_tasks:
            task.cancel()
        await application.stop()
        heart.cancel()
    logger.info("stopped")
    sys.stderr.flush()


async def kept(name: str, keep: Callable[[], Awaitable[None]], *, pause_s: float = KEEPER_PAUSE_S) -> None:
    """Keep a keeper at work: what it could not bear is logged, and it begins anew; the daemon never ends for it."""
    while True:
        try:
            await keep()
        except Exception:
            logger.exception("%s: this went wrong; it goes on in %g s", name, pause_s)
        else:
            return
        await asyncio.sleep(pause_s)


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


async def _keep_watching(what: _Watched, watch: "FileWatch", reload: asyncio.Event) -> None:
    """Have files read again that have changed: what is edited counts a moment later."""
    while True:
        await watch.changed(period_s=what.period_s, settle_s=what.settle_s)
        logger.info("%s have changed: they are read again", what.name)
        reload.set()


async def _exit_when_idle(application: "Application", stop: asyncio.Event) -> None:
    """End the daemon when it was of no use for as long as ``exit_idle``; the next connection starts it again."""
    unused_since = time.monotonic()
    while True:
        await asyncio.sleep(IDLE_LOOK_S)
        limit_s = application.loaded.settings.exit_idle
        if not application.is_unused():
            unused_since = time.monotonic()
        elif limit_s and time.monotonic() - unused_since >= limit_s:
            logger.info("nothing runs and nobody is connected: the next connection starts the daemon again")
            stop.set()
            return


async def _keep_status(application: "Application", notifier: Notifier) -> None:
    while True:
        notifier.status(application.status_line())
        await application.supervisor.changed()
        await asyncio.sleep(0.2)  # a burst of changes is one line


if __name__ == "__main__":
    sys.exit(main())
