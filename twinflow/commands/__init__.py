"""One file per command of `twinflow`: `add_options(parser)` declares what it takes, `run(options)` does it.

`run` returns the exit status, 0 or 1, and raises for everything else: `twinflow.cli` makes a line of what is raised. A
command may have `require_known(extra)`, which raises ValueError for arguments that no option takes. Its file imports
what is slow to import inside its functions, as its `--help` needs none of it.
"""
