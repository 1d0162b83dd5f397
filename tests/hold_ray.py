"""Run as a program: a Ray that the commands of tests share. Prints its address, and ends it with its input."""

import sys

import ray
import ray_workers

from rvdist.core import cluster

ray_workers.fork()
cluster.connect("local", namespace="rvdist-tests")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
cluster.disconnect()
