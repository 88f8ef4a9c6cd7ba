"""Guarded views: the walk of one request, module by module.

When a view is defined (or on the first request, for ``GUARDED_VIEWS``)::

    decorators.meterly_guard ─────┐
    middleware ── patterns ───────┴► guarding.guard_view ─┬► functions.guard_function
    mixins.MeterlyGuardMixin ─────────────────────────────┴► classes.guard_class

For each request, the wrapper of ``guard_function`` calls, in this order:

1. ``admission.Admission.admit`` checks whether the request costs something. Then
   ``lifecycle`` reads the options and reserves; ``keys`` reads the idempotency key of
   the request. ``responses`` renders a refusal.
2. ``atomic`` opens the transactions of ``ATOMIC_REQUESTS``.
3. ``execution.Execution.run`` runs the view and concludes. ``streams`` concludes after
   the last chunk, ``patches.extend_render`` after rendering.

A class has two wrappers. ``guard_class`` wraps the view, and its ``dispatch()`` finds
the handler, which ``guard_function`` wraps. ``dispatch`` has the object by which the
first wrapper informs the second.

Several of these modules use the others: ``introspection`` (what a view is), ``methods``
(which HTTP methods cost something) and ``patches`` (every change to objects of others).
"""
