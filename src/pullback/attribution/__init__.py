"""The attribution methods, one file a method or a close family.

Import the methods from `pullback` itself. Every method is a function ``method(params, model, x, target, **options)``.
"""
