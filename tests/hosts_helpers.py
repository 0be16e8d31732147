"""Starting two processes that train one run, each with a folder of its own."""

import json
import os
import socket
import subprocess
import sys
import time


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Processes:
    """Two of them, with two virtual devices each, and what they printed.

    In SLURM's environment they are not told of each other.
    """

    def __init__(self, folder, command, *flags, each=((), ()), slurm=False):
        port = free_port()
        self.folders = [folder / f"host{number}" for number in (0, 1)]
        self._processes = []
        for number, own in enumerate(self.folders):
            own.mkdir(exist_ok=True)
            words = [sys.executable, "-m", "bmjax.cli", command, *flags, *each[number]]
            words += ["--devices", "2", "--coordinator", "auto" if slurm else f"127.0.0.1:{port}"]
            environment = dict(os.environ)
            if slurm:
                environment |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost"}
                environment |= {"SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": str(port)}
                environment |= {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
            else:
                words += ["--num-processes", "2", "--process-id", str(number)]
            with (own / "out.txt").open("w") as out, (own / "err.txt").open("w") as err:
                self._processes.append(
                    subprocess.Popen(words, cwd=own, stdout=out, stderr=err, env=environment)
                )

    def wait(self, seconds=240):
        """Waits for both; returns their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [
                process.wait(max(0.1, deadline - time.monotonic())) for process in self._processes
            ]
        finally:
            for process in self._processes:
                process.kill()

    def said(self, number, stream="err"):
        return (self.folders[number] / f"{stream}.txt").read_text()

    def send(self, number, which, to_worker=False):
        """Sends a signal to a process, or to the one that works under it."""
        process = self._processes[number].pid
        if to_worker:
            listed = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True
            )
            process = int(listed.stdout.split()[0])
        os.kill(process, which)

    def await_records(self, run, number, seconds=120):
        """Waits until the metrics of a run have so many lines."""
        file, deadline = run / "metrics.jsonl", time.monotonic() + seconds
        while not (file.is_file() and len(file.read_text().splitlines()) >= number):
            assert time.monotonic() < deadline, [self.said(index) for index in (0, 1)]
            assert all(process.poll() is None for process in self._processes), self.said(0)
            time.sleep(0.02)


def timeless(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "examples_per_second"} for record in records]
