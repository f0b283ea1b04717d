"""Execute the blocks of a page, given as JSON on stdin, in this folder and in their order; stop at the first that fails."""

import json
import subprocess
import sys

namespace = {"__name__": "__main__"}
for block in json.load(sys.stdin):
    print(f"--- {block['place']}", flush=True)
    if block["title"]:
        with open(block["title"], "w", encoding="utf-8") as file:
            file.write(block["code"])
    elif block["language"] == "sh":
        subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]], check=True)
    else:
        padding = "\n" * (block["line"] - 1)  # so that a traceback names the page's own line
        exec(compile(padding + block["code"], block["place"].rpartition(":")[0], "exec"), namespace)
