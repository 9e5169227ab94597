"""Dialects of other libraries, for code that was written for them.

The only stateful corner of `pullback`: each dialect keeps the names and conventions of the library it stands for, and
calls the pure functions. New code should call those.
"""
