"""The site of the documents here: `make docs` builds it into docs/_build/html."""

import logging
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import normlab  # noqa: E402
from docs import api, commands, links  # noqa: E402

project = "normlab"
author = "The normlab authors"
copyright = "The normlab authors"
version = release = normlab.__version__
REPOSITORY = "https://github.com/normlab/normlab"
SITE = "https://normlab.github.io/normlab/"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxext.opengraph",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
suppress_warnings = ["toc.empty_glob"]

# --- Pages and notebooks ----------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build/notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# --- The reference ----------------------------------------------------------------------------

default_role = "py:obj"  # `name` in a docstring leads to it where there is one
add_module_names = False
autosummary_generate = False
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
napoleon_use_rtype = False
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
intersphinx_mapping = {
    name: (url, None)
    for name, url in {
        "python": "https://docs.python.org/3",
        "jax": "https://docs.jax.dev/en/latest",
        "flax": "https://flax.readthedocs.io/en/latest",
        "optax": "https://optax.readthedocs.io/en/latest",
        "numpy": "https://numpy.org/doc/stable",
        "pandas": "https://pandas.pydata.org/docs",
    }.items()
}
intersphinx_timeout = 10

# --- The page ---------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "normlab"
html_baseurl = SITE
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_source_button": True,
    "use_issues_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "navbar_persistent": [],  # the search stands in the sidebar
    "footer_content_items": ["copyright.html"],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}
# The report and its data are finished pages. The guide is a page here too, made of guide.md.
html_extra_path = sorted(path.name for path in DOCS.glob("report*"))
ogp_site_url = SITE
ogp_image = f"{SITE}_images/guide.png"
ogp_social_cards = {"enable": False}
linkcheck_ignore = [rf"{REPOSITORY}.*", SITE]
linkcheck_retries = 3
linkcheck_timeout = 30


def setup(app):
    """Writes the generated pages, then says how docstrings and links become what is shown."""
    # Without a network the site lacks the links into other libraries' sites, and nothing else.
    logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(
        lambda record: record.levelno < logging.WARNING
    )
    api.write(DOCS / "reference/api")
    commands.write(DOCS / "reference/command-line.md")
    api.connect(app)
    links.connect(app, DOCS, REPOSITORY, html_extra_path)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
