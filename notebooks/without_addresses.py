"""To be imported before nbformat: a checker of internet addresses that jsonschema takes where it is installed stays out.

nbformat never asks it anything, and to build its grammar takes two seconds a process.
"""

import sys

sys.modules.setdefault("rfc3987_syntax", None)
