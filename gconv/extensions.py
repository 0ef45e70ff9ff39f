"""Loading the C++ extensions: gconv runs without any of them."""

import importlib


def load(name: str, cure: str) -> str | None:
    """Imports gconv.<name>, which registers its operators with torch; returns None, or one line saying why it
    is missing and what to do."""
    module = f"gconv.{name}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f"the extension {module} is not built: {cure}"
        return f"the extension {module} did not load ({error}): {cure}"
    except ImportError as error:
        first_line = str(error).partition("\n")[0]
        return f"the extension {module} did not load ({first_line}): {cure}"
    return None
