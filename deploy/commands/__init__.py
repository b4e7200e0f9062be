"""The subcommands of `ellm`, one file each: `add_arguments(parser)` and `run(args) -> exit code`.

Nothing heavy is imported at the top of these files: `ellm --help` must answer at once.
"""
