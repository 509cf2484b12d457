"""What caching a teacher and training students from it would cost, before anything is spent.

In: a teacher, students, an amount of text, devices and rates. Out: bytes, hours, money and the break-even, by formula
or from a probe of this machine.
"""
