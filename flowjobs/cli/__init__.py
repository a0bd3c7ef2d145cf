"""The command line: the only place that prints; one file a command, and what they share.

Beside the commands, which `commands` lists:

parsing   main, parser, completion, defaults (flowjobs.toml), code_options, numbers
meaning   runs_named (which runs), prepare and prepare_sweep (config and checks, without torch)
starting  start_many, confirm, batch_script (what sbatch/*.sh call)
watching  follow, live_line
printing  output, json_output, table, overview, evaluation_table
"""

try:
    from flowjobs.cli.main import main
except KeyboardInterrupt:  # Ctrl-C while this loads, which takes a moment
    raise SystemExit(130) from None

__all__ = ["main"]
