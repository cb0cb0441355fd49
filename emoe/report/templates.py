"""HTML pages from templates: one head for all, every name escaped, nothing fetched."""

from __future__ import annotations


def render(name: str, **context: object) -> str:
    """The page of a template that extends ``base.html.jinja``. Text is escaped unless the template says ``safe``."""
    import jinja2

    import emoe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emoe.report", "."),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(version=emoe.__version__, **context)
