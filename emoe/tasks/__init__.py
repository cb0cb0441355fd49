"""Tasks by name. A further family is one new file and one line here; a user's own is a YAML file."""

from __future__ import annotations

import os
from pathlib import Path

from emoe.errors import UserError, nearest
from emoe.tasks import glue, sentiment, spam, topic
from emoe.tasks.spec import Domain, Example, Task
from emoe.tasks.user import instructions, task_from_yaml

__all__ = ["TASKS", "Domain", "Example", "Task", "get"]

TASKS: dict[str, Task] = {task.name: task for task in (sentiment.TASK, spam.TASK, topic.TASK, *glue.TASKS)}


def get(name: str) -> Task:
    """The task of a name, of a YAML file, or of a .json/.jsonl file of instructions.

    Raises:
        UserError: no such task or file, or a file that describes none.
    """
    if not name:
        raise UserError(f"--task: missing; known tasks: {', '.join(TASKS)}, or a .yaml file of your own")
    path = Path(os.path.expanduser(name))
    if path.suffix in (".yaml", ".yml"):
        return task_from_yaml(path)
    if path.suffix in (".json", ".jsonl"):
        return instructions(path)
    if name not in TASKS:
        raise UserError(f"--task: unknown task '{name}'{nearest(name, TASKS)}. Known tasks: {', '.join(TASKS)}")
    return TASKS[name]
