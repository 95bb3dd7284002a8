"""What `eagleray cluster local` does: several Ray nodes on this machine until Ctrl-C or a termination signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from eagleray.platform.local_cluster import local_cluster

_MODE = "RAY_AUTH_MODE"


def run_local_cluster(nodes: int, cpus_per_node: int) -> None:
    """Start the nodes, say how to use them, wait for a signal, stop them.

    Unless `RAY_AUTH_MODE` says otherwise the cluster asks for the user's token, as Ray does for `ray.init()`:
    without it, everybody who reaches the machine could run code as this user.
    """
    mode = os.environ.get(_MODE, "token")
    if mode == "token":
        command = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, _MODE: mode})
    print(f"Starting {nodes} node(s) with {cpus_per_node} CPU each ...", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # what a script starts in the background ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    with local_cluster(nodes=nodes, cpus_per_node=cpus_per_node, environment={_MODE: mode}) as cluster:
        print(
            f"Address:   {cluster.address}   (ray.address=...)\n"
            f"Dashboard: {cluster.dashboard}   (eagleray submit --address ...)\n"
            f"Other shells need: export {_MODE}={mode}\n"
            "Ctrl-C stops it.",
            flush=True,
        )
        try:
            while True:
                time.sleep(1)  # not `signal.pause`, which sleeps on if another thread takes the signal
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not cut the stopping short
                signal.signal(number, signal.SIG_IGN)
            print("Stopping.", flush=True)
