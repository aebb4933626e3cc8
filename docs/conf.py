"""Configuration of the documentation. Build: python -m sphinx -W -b html docs docs/_build/html."""

import lowrank_sp

project = "lowrank_sp"
author = "The lowrank_sp developers"
copyright = "2026, The lowrank_sp developers"
release = version = lowrank_sp.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
    "sphinxcontrib.bibtex",
]
exclude_patterns = [
    "_build",
    "_tables",
    "gallery/**/*.ipynb",
    "gallery/**/*.py",
    "gallery/**/*.zip",
]
templates_path = ["_templates"]
add_module_names = False
toc_object_entries = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "doc_module": ("lowrank_sp",),
    "reference_url": {"lowrank_sp": None},
    "download_all_examples": False,
    "capture_repr": (),
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
    "min_reported_time": 60,
}

html_theme = "furo"
html_title = "lowrank_sp"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}
