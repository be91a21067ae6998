"""Every way in which graincopy says no: one class, one sentence, what to do next, its own exit code.

The sentence is a template on the class, filled with the facts of the case; the hint names the next command
or move. Codes 0-3 are results (done, failed, usage, done with warnings); errors have 10 and above: each
module here says which are its own. Everybody else imports them from the package.
"""

# ruff: noqa: F403 - each class is named once, where it stands

from graincopy.core.errors.base import *
from graincopy.core.errors.machines import *
from graincopy.core.errors.repository import *
from graincopy.core.errors.request import *
from graincopy.core.errors.storage import *
