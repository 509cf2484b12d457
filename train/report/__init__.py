"""One HTML page about a cache, runs, a family, evaluations and a plan.

Files come in, facts (plain JSON) are made of them, sections of tables and plots of the facts, and one page of the
sections: ``facts`` and its readers, then ``sections``, then ``page``.
"""
