"""The operations table: name, input, help and output of everything graincopy does. All faces are made from it.

Nothing heavy is imported here, so that ``graincopy --help`` answers at once; ``action`` names the function that does
the work, as ``module:function``, and is looked up when the operation runs.
"""

from __future__ import annotations

from graincopy.app.operations.base import Input, Operation, Table
from graincopy.app.operations.host import HOST
from graincopy.app.operations.repository import REPOSITORY
from graincopy.app.operations.restore_points import RESTORE_POINTS
from graincopy.app.operations.views import VIEWS

__all__ = ["OPERATIONS", "Input", "Operation", "Table"]

OPERATIONS = Table((*RESTORE_POINTS, *VIEWS, *REPOSITORY, *HOST))  # in the order of --help
