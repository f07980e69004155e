from invoke import task
@task
def doctor(c):
    print("hi")
