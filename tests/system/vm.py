"""A virtual machine with the project installed, for what needs a kernel of its own: the OOM killer.

By hand, as root, in the root of the repository: ``python -m tests.system.vm``. It takes two minutes, less with
``--kvm`` where the processor's help can be had. Needs qemu-system-x86 and cpio, and a kernel: the newest in /boot,
``--kernel vmlinuz``, or else Debian's linux-image-cloud, which is fetched and unpacked, not installed.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .conftest import install  # noqa: TID252
from .daemon import MODELS, RECIPES, Daemon, unit_of  # noqa: TID252
from .host import Host  # noqa: TID252

MEMORY_MIB = 4096
TIMEOUT_S = 900
KERNEL_PACKAGE = "linux-image-cloud-amd64"
BEGIN, END = "--- the check begins", "--- the check ends"
# The KV cache takes half a GiB, and is cleared when it is made: the kernel must act.
HUNGRY = TinyModel(name="hungry", n_layers=16, n_embd=256, n_head_kv=4)
FIELDS: dict[str, object] = {"max_model_len": 2048, "max_num_seqs": 16, "threads": 1}

INIT = """\
#!/bin/sh
# systemd's sandbox wants a root that it can pivot; the kernel's own initial one is none.
mount -t tmpfs -o size=3g,mode=0755 root /mnt
cp -ax / /mnt 2>/dev/null
cd /mnt
mount --move . /
exec chroot . /usr/lib/systemd/systemd
"""
UNIT = f"""\
[Unit]
After=basic.target llmstudiod.socket llmstudiod-admin.socket llmstudio-launcher.socket
Wants=basic.target llmstudiod.socket llmstudiod-admin.socket llmstudio-launcher.socket
[Service]
Type=oneshot
ExecStart=/usr/local/bin/check
StandardOutput=file:/dev/ttyS0
StandardError=inherit
ExecStopPost=/usr/bin/systemctl poweroff --force --force
TimeoutStartSec={TIMEOUT_S}
"""
CHECK = f"""\
#!/bin/sh
echo "{BEGIN}"
ask() {{ python3 - "$1" <<'END'
import json, sys, urllib.error, urllib.request
body = json.dumps({{"model": sys.argv[1], "max_tokens": 4, "messages": [{{"role": "user", "content": "a bird"}}]}})
request = urllib.request.Request("http://127.0.0.1:8080/v1/chat/completions", body.encode())
request.add_header("Content-Type", "application/json")
try:
    with urllib.request.urlopen(request, timeout=120) as answer:
        print(sys.argv[1], "answers:", json.load(answer)["choices"][0]["message"]["content"])
except urllib.error.HTTPError as error:
    told = json.load(error)["error"]
    print(sys.argv[1], error.code, told["kind"], told["failure"], told["message"], "| hint:", told["hint"])
END
}}
ask tiny
ask hungry
systemctl show --property=Result {unit_of("hungry")}
llmstudioctl status hungry | head -n 8
ask tiny
echo "{END}"
"""


def needed() -> list[str]:
    """Return the programs that are missing."""
    return [name for name in ("qemu-system-x86_64", "cpio", "gzip", "dpkg-deb") if shutil.which(name) is None]


def find_kernel(directory: Path) -> Path:
    """Return a kernel's file: this machine's newest, or Debian's, which is put below the directory."""
    own = sorted(Path("/boot").glob("vmlinuz-*"))
    if own:
        return own[-1]
    shown = subprocess.run(["apt-cache", "depends", KERNEL_PACKAGE], check=True, capture_output=True, text=True)
    package = next(line.split()[1] for line in shown.stdout.splitlines() if "Depends: linux-image-" in line)
    directory.chmod(0o777)  # apt fetches as a user of its own
    subprocess.run(["apt-get", "download", "-qq", package], check=True, cwd=directory)
    (archive,) = directory.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, directory / "kernel"], check=True)
    return next((directory / "kernel/boot").glob("vmlinuz-*"))


def prepare(host: Host, scratch: Path) -> None:
    """Put the project, two models and the check into a host's tree; nothing of it is started there."""
    install(host)
    daemon = Daemon(host)
    host.run("mkdir", "-p", RECIPES, MODELS)
    for name, model in (("tiny", TinyModel()), ("hungry", HUNGRY)):
        write_tiny_gguf(scratch / f"{name}.gguf", model)
        host.put(scratch / f"{name}.gguf", f"{MODELS}/{name}.gguf")
    daemon.put_recipe({"id": "hungry", "model_path": f"{MODELS}/hungry.gguf"} | FIELDS)
    # An administrator's own limit, of which the daemon knows nothing.
    drop_in = "[Service]\nMemoryMax=200M\nMemorySwapMax=0\n"
    host.write(f"/etc/systemd/system/{unit_of('hungry')}.d/limit.conf", drop_in)
    host.write("/usr/local/bin/check", CHECK, mode=0o755)
    host.write("/etc/systemd/system/check.service", UNIT)
    host.write("/init", INIT, mode=0o755)


def pack(host: Host, archive: Path) -> None:
    """Write a host's tree as an initial RAM disk."""
    pack_it = f"find . -xdev -print0 | cpio --null --create --quiet --format=newc | gzip -1 > {archive}"
    subprocess.run(["sh", "-c", f'cd "$0" && {pack_it}', host.path("/")], check=True)


def boot(kernel: Path, archive: Path, *, has_kvm: bool) -> str:
    """Run the machine until it switches itself off, and return what it wrote to its serial line."""
    accelerator = ["-enable-kvm", "-cpu", "host"] if has_kvm else ["-accel", "tcg,thread=multi", "-cpu", "max"]
    command = [
        "qemu-system-x86_64", *accelerator, "-m", str(MEMORY_MIB), "-smp", "2", "-nographic", "-no-reboot",
        "-nic", "none", "-kernel", str(kernel), "-initrd", str(archive),
        "-append", "console=ttyS0 quiet systemd.unit=check.service systemd.show_status=no panic=-1",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    return (done.stdout + done.stderr).decode(errors="replace")


def main() -> int:
    """Boot, look for the words, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a kernel with memory cgroups and without need of modules")
    parser.add_argument("--kvm", action="store_true", help="use the processor's help")
    arguments = parser.parse_args()
    if missing := needed():
        sys.stderr.write(f"missing: {', '.join(missing)}; on Debian: apt install qemu-system-x86 cpio\n")
        return 2
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scratch = Path(name)
        scratch.chmod(0o755)
        host = stack.enter_context(Host())
        prepare(host, scratch)
        pack(host, scratch / "root.cpio.gz")
        text = boot(arguments.kernel or find_kernel(scratch), scratch / "root.cpio.gz", has_kvm=arguments.kvm)
    shown = text.partition(BEGIN)[2].partition(END)[0]
    sys.stdout.write(shown or text)
    expected = ("hungry 503 load_failed oom_kill", "for want of memory", "Result=oom-kill", "tiny answers")
    absent = [words for words in expected if words not in shown]
    sys.stdout.write(f"not found: {absent}\n" if absent else "an OOM kill is told as one\n")
    return 1 if absent else 0


if __name__ == "__main__":
    sys.exit(main())
