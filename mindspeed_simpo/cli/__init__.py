"""The commands: flags, exit codes, the ranks of this host, the check before a run."""
