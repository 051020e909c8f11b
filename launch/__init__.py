"""Starting runs: on this machine, on machines one by one, or as a job of SLURM. Imports no torch."""

from launch.job import JobFiles, write_job
from launch.machines import local_command, node_commands

__all__ = ["JobFiles", "local_command", "node_commands", "write_job"]
