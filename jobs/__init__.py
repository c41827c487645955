"""Entry points: parse, validate, call the pipeline, exit code."""

from jobs.exits import end_at_interrupts_while_importing

end_at_interrupts_while_importing()
