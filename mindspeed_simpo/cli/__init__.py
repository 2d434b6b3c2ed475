"""The command line: flags, exit codes, the launch of ranks on this host, the pre-flight check."""
