#include <stdio.h>
#include <stdlib.h>
#include <tally.h>

static char *contents(const char *path)
{
    FILE *file = fopen(path, "r");
    char *text = NULL;
    size_t size;

    if (!file || (getdelim(&text, &size, '\0', file) < 0 && ferror(file))) {
        perror(path);
        exit(1);
    }
    fclose(file);
    return text;
}

int main(int count, char **paths)
{
    for (int i = 1; i < count; i++) {
        char *text = contents(paths[i]);
        printf("%s: %zu lines, %zu words\n", paths[i], tally_lines(text), tally_words(text));
        free(text);
    }
    return 0;
}
