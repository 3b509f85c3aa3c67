"""The command line of Nexus: flags to requests, results to streams; nothing heavy is imported until it is needed."""
