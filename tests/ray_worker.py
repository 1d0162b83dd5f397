"""Run as a program where Ray runs Python for a worker: has tests/ray_workers.py fork one, and ends when it does."""

import json
import os
import signal
import socket
import sys

line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
line.connect(sys.argv[1])
blocked = list(signal.pthread_sigmask(signal.SIG_BLOCK, []))
asked = {"arguments": sys.argv[2:], "cwd": os.getcwd(), "environment": dict(os.environ), "blocked": blocked}
socket.send_fds(line, [json.dumps(asked).encode()], [1, 2])
line.recv(1)
