#!/usr/bin/env python3
"""Stands in for llama-server where the upstream must be no bottleneck: nginx on the Unix socket that --host names.

Understands as much of llama-server's command line as the daemon asks, and closes connections as llama-server does,
after 5 s of rest or 100 requests. Set it as `llama_server`.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ANSWER = json.dumps(
    {
        "id": "chatcmpl-benchmark",
        "object": "chat.completion",
        "created": 1,
        "model": "bench",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "small answer"}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
    }
)
CONFIG = """\
daemon off; worker_processes 1; pid {directory}/pid; error_log stderr warn; master_process off;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_timeout 5; keepalive_requests 100; client_body_buffer_size 1m;
  default_type application/json;
  client_body_temp_path {directory}/b; proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f;
  uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
  server {{
    listen unix:{socket} backlog=4096;
    location = /health {{ return 200 '{{"status":"ok"}}'; }}
    location = /props {{ return 200 '{props}'; }}
    location / {{ return 200 '{answer}'; }}
  }}
}}
"""


def main() -> int:
    """Answer the daemon's questions, or become nginx."""
    arguments = sys.argv[1:]
    if arguments[-1:] == ["--version"]:
        print("version: nginx as llama-server")
        return 0
    if arguments[:1] in (["--help"], ["--completion-bash"], ["--list-devices"]):
        return 0
    given = dict(itertools.pairwise(arguments))
    directory = tempfile.mkdtemp(prefix="nginx-")
    slots = {"total_slots": 256, "default_generation_settings": {"n_ctx": 4096}, "model_alias": given["--alias"]}
    config = Path(directory, "nginx.conf")
    config.write_text(
        CONFIG.format(directory=directory, socket=given["--host"], props=json.dumps(slots), answer=ANSWER)
    )
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    assert nginx is not None
    os.execv(nginx, ["nginx", "-p", directory, "-e", "stderr", "-c", str(config)])
    return 1


if __name__ == "__main__":
    sys.exit(main())
