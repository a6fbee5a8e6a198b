"""Links that are right on GitHub, as they are on the site.

A link to a file that is no page leads to the file on GitHub, one to the report to the report, and
`nl.batch_norm` in a text to the function.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

PUBLIC = re.compile(r"(?:nl|normlab)\.([\w.]*\w)(?:\(\))?")


def connect(app, docs: Path, repository: str, finished: list[str]) -> None:
    """Has the links of each page rewritten when it has been read."""

    def rewrite(app, doctree):
        here = Path(app.env.doc2path(app.env.docname)).parent
        for node in list(doctree.findall(addnodes.download_reference)):
            name, _, anchor = node["reftarget"].partition("#")
            target = (docs / name.lstrip("/") if name.startswith("/") else here / name).resolve()
            if target.parent == docs and target.name in finished:
                uri = "../" * app.env.docname.count("/") + target.name
            else:
                kind = "tree" if target.is_dir() else "blob"
                uri = f"{repository}/{kind}/main/{target.relative_to(docs.parent).as_posix()}"
            link = nodes.reference("", "", *node.children, refuri=uri + (anchor and f"#{anchor}"))
            node.replace_self(link)
        for node in list(doctree.findall(nodes.literal)):
            named = PUBLIC.fullmatch(node.astext())
            if named and not isinstance(node.parent, nodes.reference | addnodes.pending_xref):
                target = f"normlab.{named[1]}"
                link = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=target, refdoc=app.env.docname
                )
                node.replace_self(link)
                link += node

    app.connect("doctree-read", rewrite)
